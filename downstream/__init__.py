"""What fine-tuning is made of: trunks, heads, labeled data, scores, schedules; `transfer.py`
composes a run."""
