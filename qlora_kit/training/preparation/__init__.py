"""A model made ready before it gets adapters, and asked afterwards whether training reaches them.

It works on a bare model and must not need a wrapper: what it does for training it does to any torch model.

- ``kbit``: ``prepare_model_for_kbit_training``, with a bill of what memory holds
- ``float32``: modules held in float32 while they are trained around, and their way back
- ``quantize``: ``quantize_``, linear layers from dense storage to few bits
- ``trainers``: what trainers put on the model below the adapters, and its way off
- ``sharding``: what FSDP2 can't shard, said before the first step
- ``gradients``: ``check_gradients``
"""
