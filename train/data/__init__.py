"""The data of a run, from files to batches.

emoji/      the default set: real image-text pairs, fetched and drawn once, by `python -m train.data` or on demand
record      one image-text pair, and what every source of them offers
captions    the rules by which text is cleaned
images      pictures from the bytes of their files
sampler     what each step reads: functions of (seed, step)
corruption  captions exchanged on purpose
loader      the batches of the steps, read and prepared by worker processes
workers     these processes: how they start, fail and end
stream      batches of shards that can only be read from their beginning
shards      the writer of shards
"""
