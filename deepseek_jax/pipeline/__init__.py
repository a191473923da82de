"""Pipelines as tables: which device does what in which tick, what that costs, and what a device is told to do.

`table` (the form and its rules), `orders` (what each device does one after the other), `schedules` (one function per
published schedule), `simulation` (idle time, live activations), `program` (arrays of integers for an executor),
`drawing`. No JAX in here: a schedule is known before any array is.
"""
