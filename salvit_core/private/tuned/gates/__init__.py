"""A gate a file: what the dealer makes for it beside what the parties do with it, its range and what it costs.

Each says in its docstring what it realises, as its `Functionality`, in the form that `tuned` explains.
"""
