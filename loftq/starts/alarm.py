"""When a start leaves so much that the model may be ruined, and how that is said.

Which errors go with a ruined model was measured on SmolLM2-135M (benchmarks/real_models.py; all 210 linears, rank 16,
English news; 16 bits: perplexity 34.5):

TABLE

No layer ruins it alone: each put into the 16-bit model by itself, at 2 bits without a text, adds at most 0.14 to the
loss of 3.5, and what they add on their own is about what they add together. So it is the root mean square of all layers
that is looked at, and no layer's own error. Errors of outputs that a sequential method reports are smaller where it
counts, in the first blocks, and are made against each other's: more of them is borne.
"""

from __future__ import annotations

#: Root mean square over the layers above which is warned: of W - Q - sBA relative to W; of the outputs; and of the
#: outputs by a method that sees what earlier layers got wrong. Between the worst start that kept the model useful
#: and the best that didn't.
WEIGHT, OUTPUT, SEQUENTIAL = 0.12, 0.2, 0.3


def alarm(weight_error: float, output_error: float | None, *, sequential: bool = False) -> str:
    """What to say of a start with these errors of all layers; empty where there is nothing to say."""
    what, error = ("outputs", output_error) if output_error is not None else ("weights", weight_error)
    most = WEIGHT if output_error is None else SEQUENTIAL if sequential else OUTPUT
    if error <= most:
        return ""
    fix = (
        "a text to look at the inputs with (calibration)"
        if output_error is None
        else "more bits, a higher rank, or more text of what the model is for"
        if sequential
        else "method 'aligned', more bits, or a higher rank"
    )
    return (
        f"WARNING: the layers' {what} are off by {error:.2f} of their size (root mean square), and above {most:.2f} a "
        f"small language model was ruined: measure its perplexity before you train on, or take {fix}"
    )
