"""What fine-tuning is made of: trunks, heads, labelled data, scores, schedules; `transfer.py`
composes a run."""
