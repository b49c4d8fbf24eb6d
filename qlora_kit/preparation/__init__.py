"""A model made ready before it gets adapters, and asked afterwards whether training reaches them.

- ``kbit``: ``prepare_model_for_kbit_training``, with a bill of what memory holds
- ``quantize``: ``quantize_``, linear layers from dense storage to few bits
- ``gradients``: ``check_gradients``
"""
