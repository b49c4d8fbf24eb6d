"""Which quantized weight and which branch together stand best for one weight: tensors in, tensors out.

Every method minimizes an error in one of few metrics, with the quantizer that is deployed, so methods are put together
from the same few parts. None must ever know of a module, a path or a file: a weight gets the same bits whether a model
in memory, a shard or a test brings it.

- ``registry``: what a method is asked for and gives, and the methods by name
- ``factorization``: ``factorize``, one weight by a method's name
- ``alternation``: quantize, correct, repeat: the loop that all methods share
- ``factors``: what is made of moments, once for all weights with the same inputs
- ``metric``: how an error is measured, by the weight alone or on the inputs
- ``quantizers``: which quantizer the loop runs with
- ``rounding``: scales searched by block, codes by error feedback
- ``trellis``: the same along a trellis, for rotated types
- ``nearest``: methods that round to the nearest codes
- ``halves``: moments of a part of the inputs, to hold what is found against the rest
- ``alignment``: the weight that makes up for earlier layers, as far as the text is to be believed
- ``leaning``: the metric whose rounding errors the adapter takes back
- ``foretold``: what error feedback will leave, without rounding
- ``error_feedback``: methods whose quantized weight is fitted to the inputs
- ``principal``: methods that keep the weight's own top directions out of what is quantized
- ``descent``: codes for a small delta on a weight that lies on the grid already
- ``checks``: what can be no second moments is refused
"""

from . import error_feedback, nearest, principal  # noqa: F401  # they register their methods
