"""Write the golden adapters beside this file with the installed peft: ``python tests/data/make_golden.py``.

``golden/base.safetensors`` is a TinyNet, ``golden/expected.safetensors`` the ids put in and the logits that PEFT's
model gave for each case, ``golden/<case>/`` what PEFT saved. They are stored so that the files of a PEFT release
stay readable when the installed release changes.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from tiny_net import CASES, TinyNet, randomize_trainable_  # noqa: E402


def main() -> None:
    import peft

    warnings.simplefilter("ignore")
    golden = HERE / "golden"
    golden.mkdir(exist_ok=True)
    torch.manual_seed(0)
    base = TinyNet().eval()
    save_file(base.state_dict(), golden / "base.safetensors")
    expected = {"ids": torch.randint(0, 11, (5, 4))}
    for case, fields in CASES.items():
        model = TinyNet().eval()
        model.load_state_dict(base.state_dict())
        adapted = peft.get_peft_model(model, peft.LoraConfig(**fields))
        randomize_trainable_(adapted)
        adapted.save_pretrained(str(golden / case))
        (golden / case / "README.md").unlink()
        with torch.no_grad():
            expected[case] = adapted.eval()(expected["ids"])
    save_file(expected, golden / "expected.safetensors")
    print(f"wrote {len(CASES)} adapters with peft {peft.__version__} to {golden}")


if __name__ == "__main__":
    main()
