"""How the adapters of a model start: a method of ``loftq.methods`` carried out on modules, and the account of it.

Here a weight has a module, a path and a configuration around it. How a budget gave it its bits, and whether the model
lies in memory or on disk, is nothing to a start: the same function makes it in every case.

- ``one_module``: the start of one module, quantized here or before
- ``whole_model``: the starts of a model in memory, in the order of its forward where the method looks at inputs
- ``alarm``: when a start may have ruined the model
- ``default_text``: the text of a start of few bits that nobody gave one
- ``options``: what a ``LoftQConfig`` says of one module
- ``startable``: which modules can be started
- ``kept_dense``: what stays dense in a model of few bits, and where its adapters start
- ``report``: what a start did, layer by layer and in all
"""
