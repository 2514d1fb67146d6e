"""A model opened for planning, without its weights: from a source to what `Job`s are made of.

`source.py` opens it, its data too (`rows.py`); `job.py` makes a job of that, `steps.py` what the method adds to a step.
Everything here needs torch and transformers; `jobs.py` imports it only where its cache has not what is asked for.
"""
