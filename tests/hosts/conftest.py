"""Other people's trainers, as they are installed; a file of tests is skipped, by name, where its host is not."""

from helpers.hosts import on_cpu

on_cpu.prepare()
