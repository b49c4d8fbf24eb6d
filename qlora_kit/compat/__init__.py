"""Other libraries' names over this toolkit's objects, so that existing scripts run here.

- ``peft``: PEFT's names; a script runs after its import line is changed
- ``configs``: PEFT's configuration names
- ``tasks``: PEFT's model classes, and a trained head where the task calls for one
- ``auto``: from an adapter's folder alone to base model and adapter
- ``in_peft``: our configurations and layers where peft itself meets them
- ``hub``: where an adapter lies, on this machine or on the Hub
- ``loftq``: PEFT's ``replace_lora_weights_loftq``
- ``status``: what state a model's adapters are in
"""
