"""Parts of `benchmarks/step_cost.py` and `benchmarks/scaling_law.py`."""
