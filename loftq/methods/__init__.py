"""One weight in, a quantized weight and a branch out: pure tensor functions that know no module and no file.

- ``registry``: what a method is asked for and gives, and the methods by name
- ``factorization``: ``factorize``, one weight by a method's name
- ``alternation``: quantize, correct, repeat: the loop that all methods share
- ``metric``: how an error is measured, by the weight alone or on the inputs
- ``quantizers``: which quantizer the loop runs with
- ``rounding``: scales searched by block, codes by error feedback
- ``error_feedback``: methods whose quantized weight is fitted to the inputs
- ``principal``: methods that keep the weight's own top directions out of what is quantized
- ``descent``: codes for a small delta on a weight that lies on the grid already
- ``checks``: what can be no second moments is refused
"""

from . import error_feedback, factorization, principal  # noqa: F401  # they register their methods
