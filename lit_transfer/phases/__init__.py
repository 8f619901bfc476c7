"""The schedule: a table of phases, what each step uses of it, and the loop that runs it."""
