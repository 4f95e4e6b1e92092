"""What tests share, imported as `from helpers.jobs import start`.

data         a tiny data set, and a configuration that trains on it in seconds
jobs         whole jobs of the trainer, started as users start them
saved_runs   checkpoints without a job
step_worker  one rank of the tests that look inside a training step
faults/      what breaks in a job's ranks on purpose
signals      children that answer signals as they would in a terminal
"""
