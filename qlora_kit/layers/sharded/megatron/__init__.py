"""Megatron's sharded linears and tables, and TransformerEngine's: types known by their names, nothing imported.

megatron-core is heavy to import and has forks under other names; TransformerEngine's types exist where it is installed.
So neither is asked for a class: ``meet`` looks at the types of modules as they come, and registers codec, layer family
and sharding for those of a known name from these libraries.

- ``types``: the table of names
- ``shardings``: how each says what its part is of a whole
- ``storage``: how the part is kept, dense or in few bits
- ``linear``: branches beside what returns pairs of output and bias, and beside a norm and a linear in one
- ``embedding``: tables sharded by words
- ``parts``: rows of a fused linear as linears of their own
- ``random``: whose random state dropout draws from
"""

from .types import add_library, meet

__all__ = ["add_library", "meet"]
