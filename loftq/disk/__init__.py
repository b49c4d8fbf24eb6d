"""``loftq init``: a 16-bit checkpoint in, a quantized one and its adapter out, a tensor at a time, resumed if cut off.

What becomes of a weight is decided by the functions that start it in memory; here is only where it comes from, where it
goes, and how a run that is cut off goes on. Nothing here may depend on the whole model being in memory.

- ``task``: what is asked for, and what each stored tensor becomes
- ``checkpoint``: what is to be done, from config and headers
- ``stream``: the run
- ``ahead``: units that are finished before it is their turn to be written
- ``devices``: where they are worked on
- ``lines``: what is noted of a finished one
- ``chosen_bits``: bits under a budget, measured module by module and then chosen
- ``calibration``: text through the model, whose weights stay in their shards
- ``kept_weights``: a block's, read once while it is computed many times
- ``replacements``: from a stored tensor to what takes its place
- ``resumed``: what an earlier run's journal says, held against what is to be done
- ``writers``: the files while they grow
- ``output``: what the output is called and how large it will be
- ``progress``: bars
- ``checks``: what was written, held against what was noted then, and loaded
- ``distilled``: the adapter learns from the original
- ``verify``: do model and adapter belong together, and is the report true?
"""
