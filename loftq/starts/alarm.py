"""When a start leaves so much that the model may be ruined, and how that is said.

Which errors go with a ruined model was measured on SmolLM2-135M (benchmarks/real_models.py; all 210 linears, rank 16,
English news, before any fine-tune):

| start | of weights | of outputs | perplexity, to that of 16 bits |
| --- | ---: | ---: | ---: |
| 3 bits, "loftq" | 0.158 | | 4.0 times |
| 2 bits, "loftq" | 0.302 | about 0.29 | 158 times |
| 2 bits, "qera", on 8 rows of 256 tokens | | 0.21 | 6.5 times |
| 2 bits, "cloq", on the same | | 0.156 | 5.8 times |
| 2 bits, "aligned", on 8 rows of the built-in text | | 0.130 | 8.5 times |
| 2 bits, "aligned", on 32 rows | 0.386 | 0.154 | 1.7 times |

No layer ruins it alone: each put into the 16-bit model by itself, at 2 bits by "loftq", adds at most 0.44 to the loss,
0.011 in the median. What 84 of them (most of early blocks, so no fair sample) add one by one, scaled up to 210, comes
to what all add together, 5.1. So it is the root mean square of all layers that is looked at, and no layer's own error.
Once inputs are looked at the weights' errors say nothing. A sequential method's errors of outputs are what it leaves of
its aim, in which each layer makes up for those before it, and they are borne where others' aren't. But all are measured
on the calibration text, and on little of it (8 rows are 1.3 tokens for each input of the widest layer) that is fitted
rather than the model.
"""

from __future__ import annotations

#: Root mean square over the layers above which is warned: of W - Q - sBA relative to W; of the outputs; of the outputs
#: by a method that sees what earlier layers got wrong, and of those where there are no ENOUGH tokens for each input of
#: the widest layer. The third lies above what came to 1.7 times the perplexity, the others below all that came to four
#: times and more.
WEIGHT, OUTPUT, SEQUENTIAL, FITTED, ENOUGH = 0.12, 0.15, 0.2, 0.1, 4


def alarm(
    weight_error: float,
    output_error: float | None = None,
    *,
    sequential: bool = False,
    tokens_per_input: float | None = None,
) -> str:
    """What to say of a start with these errors of all layers; empty where there is nothing to say.

    Args:
        output_error: None where no inputs were looked at.
        sequential: whether the method sees what earlier layers got wrong.
        tokens_per_input: that the errors of outputs were measured on, of the layer that has the fewest; None where that
            isn't known.
    """
    what, error = ("outputs", output_error) if output_error is not None else ("weights", weight_error)
    short = tokens_per_input is not None and tokens_per_input < ENOUGH
    most = WEIGHT if output_error is None else OUTPUT if not sequential else FITTED if short else SEQUENTIAL
    if error <= most:
        return ""
    fix = (
        "a text to look at the inputs with (calibration)"
        if output_error is None
        else f"more text: these are of {tokens_per_input:.1f} tokens for each input of a layer"
        if short
        else "more bits, a higher rank, or text of what the model is for"
        if sequential
        else "method 'aligned', more bits, or a higher rank"
    )
    return (
        f"WARNING: the layers' {what} are off by {error:.2f} of their size (root mean square); above {most:.2f} a "
        f"language model came to several times its perplexity: measure this one's before you train on, or take {fix}"
    )
