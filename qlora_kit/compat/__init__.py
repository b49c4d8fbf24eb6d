"""Other libraries' names over this toolkit's objects, so that existing scripts run here.

- ``peft/``: PEFT's names, module by module; a script runs after its import lines are changed
- ``configs``: PEFT's configurations and enumerations
- ``model``: ``PeftModel``
- ``lenient``: where PEFT warns and goes on
- ``tasks``: its class for each task, and a trained head where the task calls for one
- ``auto``: from an adapter's folder alone to base model and adapter
- ``in_peft``: our configurations and layers where peft itself meets them
- ``injecting``: from a bare model and a configuration to a model with adapters
- ``state``: state dicts of adapters and of the base
- ``status``: what state a model's adapters are in
- ``layer_kinds``: PEFT's layer classes, for ``isinstance``
- ``matching``: names against a configuration, without a model
- ``hub``: where an adapter lies, on this machine or on the Hub
- ``loftq``: PEFT's ``replace_lora_weights_loftq``
- ``meta``: factors without memory, which a later load fills
- ``errors``: PEFT's error and warning classes
- ``foreign``: PEFT's other methods, importable and refused when used
- ``neighbours/``: how this package meets libraries that may be there, or not, or later
"""
