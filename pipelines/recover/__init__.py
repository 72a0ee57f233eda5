"""Recovery: training that mends what pruning and rounding broke. docs/recover.md describes it."""
