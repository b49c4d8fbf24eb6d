"""How this package meets libraries that may be there, or not, or later; it imports none of them.

It knows nothing of models and adapters.

- ``on_import``: something is done when a library is imported, if ever
- ``quieted``: their advice is kept to itself for a while
- ``passing``: objects that pass for another library's
- ``unpartitioned``: models without weights, built while DeepSpeed cuts those with weights
"""
