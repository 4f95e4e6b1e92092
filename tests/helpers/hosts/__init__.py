"""What tests of other people's trainers share, imported as `from helpers.hosts.recording import Recording`.

digits            small real data: handwritten digits with captions, and sentences in pairs
lightning_towers  towers in Lightning's trainer, with its dense loss and with ours
metric_towers     towers under pytorch-metric-learning's losses of two tensors, and under ours
on_cpu            hosts on a machine without a GPU, where some of them do not start
open_clip_runs    open_clip's own main, many times in one process or in two
pages             the complete scripts of a page, and the commands that run them
recording         what a host's own loop did: losses, the first step's gradients, the last parameters
saved             bytes that a forward pass keeps for its backward pass
sentences         a tiny BERT in sentence-transformers' trainer, with the host's losses and with ours
trainer_runs      transformers' Trainer on digits, with the host's loss and with ours
two_processes     what such a module does as a job of two processes
"""
