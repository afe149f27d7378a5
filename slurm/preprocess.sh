#!/usr/bin/env bash
# Prepares data on a SLURM cluster: this job submits an array of jobs for each stage and waits.
#
#   sbatch slurm/preprocess.sh                                            # configs/base.yaml
#   sbatch slurm/preprocess.sh --config configs/sample.yaml slurm.partition=cpu slurm.time=02:00:00
#
# Submit from the root of the checkout, whose .venv holds the environment; raw_dir and out_dir must be
# on a file system that all nodes share. Options of sbatch given on its command line win over the
# ones below; what the arrays ask for are the keys `slurm:`. This job does the stages of one task
# itself: training the tokenizer takes 13 bytes of memory for each of tokenizer.sample_bytes. It needs
# as much time as everything together. Whatever ends it, submit it again: what is done is not done
# again. The log is slurm-JOBID.log in the same folder.
#SBATCH --job-name=clinical-modernbert-data
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=1
#SBATCH --mem=16G
#SBATCH --time=7-00:00:00
#SBATCH --requeue
#SBATCH --output=slurm-%j.log
#SBATCH --open-mode=append
set -euo pipefail

if [[ ! -f .venv/bin/activate ]]; then
  echo "error: $PWD holds no .venv; submit from the root of the checkout, after make install" >&2
  exit 2
fi
source .venv/bin/activate
exec python -m data_prep executor=slurm workers=null "$@"
