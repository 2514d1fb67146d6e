"""Names of the files that a run leaves in its output_dir, beside the adapter."""

CONFIG_NAME = "ssdtune.yaml"  # every key of the run
METRICS_NAME = "metrics.jsonl"  # what was logged
RESULTS_NAME = "results.json"  # what the run came to
TRACE_NAME = "trace.jsonl"  # the ops of its last steps
LOG_NAME = "zeroth_order.jsonl"  # the steps of a run by forward passes alone
PLAN_NAME = "plan.json"  # the plan of its last steps and its prediction
CHECK_NAME = "pack_check.json"  # what packing costs, beside a packed model
