"""Slurm: submit a recipe, sweep it, watch it, resubmit what failed, collect the table. Everything it knows is on disk, in the run folders.

runs/NAME/recipe.yaml            what to do
runs/NAME/slurm/jobs.jsonl       every submission: job id, options, where its log is
runs/NAME/slurm/starts.jsonl     every start and requeue, and the step it started from
runs/NAME/slurm/failure-RANK.json  why a rank ended
runs/.slurm/JOB/                 submitit's script, pickles and logs
runs/.snapshots/HASH/            the code at submission
"""
