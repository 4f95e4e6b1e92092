"""Studies: a grid of runs that differ in a method, a condition and a seed, and what their differences show.

softclip-train grid STUDY.yaml --folder studies/a
softclip-train compare studies/a

plan        the study's file: which runs there are, each with its configuration
grid        the command that carries them out
jobs        processes side by side, of which each may fail alone
finished    what is kept of a run that is done, a JSON line each
"""
