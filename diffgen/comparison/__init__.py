"""The scheduler laboratory: plan, run, metrics, report, tune."""
