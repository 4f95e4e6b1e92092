"""The loss in other people's trainers: one module a host, named after it. Each imports its host when it is imported,
names what it relies on (`HOOKS`), and raises `UnknownHost` where the installed host is another one. See
docs/integrations.md.
"""
