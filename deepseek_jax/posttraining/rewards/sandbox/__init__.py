"""Foreign Python code, run where it can do no harm: `session` starts it and asks, `inside` runs behind `walls`."""
