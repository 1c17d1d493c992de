"""The fusion benchmark: which way of adapting and merging gives the thing in the style, measured against true pictures.

    python -m benchmarks.fusion splits   # writes splits.json from the data set
    python -m benchmarks.fusion screen   # every method on dev, chosen learning rates and weights
    python -m benchmarks.fusion test     # the best of them, as they were chosen, on test
    python -m benchmarks.fusion report   # tables and plots of what is there

What is compared lies in data files beside the code: `methods.json` (adapters and their learning rates), `merges.json`
(ways to merge), `stages.json` (how much of it). A new method or merge is an entry there. What was trained, drawn and
scored is kept under `--work` by the hash of what it depends on, so a run that was stopped goes on.
"""
