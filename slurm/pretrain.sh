#!/usr/bin/env bash
# Pretrains on a SLURM cluster: one Python process a GPU, started by srun.
#
#   sbatch slurm/pretrain.sh                                             # configs/base.yaml
#   sbatch --gpus-per-node=4 --ntasks-per-node=4 slurm/pretrain.sh --config …       # four GPUs
#   sbatch --nodes=2 slurm/pretrain.sh --config …                        # two nodes of eight
#   sbatch --partition=gpu --account=lab --time=1-00:00:00 --mem=0 slurm/pretrain.sh --config …
#   sbatch slurm/pretrain.sh --config configs/demo.yaml phases.main.lr.peak=1e-3
#   sbatch --ntasks-per-node=2 --gpus-per-node=0 --cpus-per-task=1 slurm/pretrain.sh ...  # no GPU
#
# Every task sees all GPUs of its node and takes that of its local rank; with --gpus-per-task=1 instead
# of --gpus-per-node each sees its own.
#
# Submit from the root of the checkout, whose .venv holds the environment. Options of sbatch given
# on its command line win over the ones below. The log is slurm-JOBID.log in the same folder.
#
# Whatever ends the job (its time, a preemption, a node that fails), the same command goes on from
# the newest checkpoint, at the cost of the steps since (`checkpoint.every_steps`): nothing is
# written when SLURM asks it to end. A job that is preempted or whose node fails is queued again by
# itself, where the cluster allows it. For a run that is longer than a job may be, submit it several times, with as many GPUs each
# time and --dependency=singleton: each begins where the one before ended, and one that finds nothing
# left to do ends at once.
#SBATCH --job-name=clinical-modernbert
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --requeue
#SBATCH --output=slurm-%j.log
#SBATCH --open-mode=append
set -euo pipefail

if [[ ! -f .venv/bin/activate ]]; then
  echo "error: $PWD holds no .venv; submit from the root of the checkout, after make install" >&2
  exit 2
fi
source .venv/bin/activate

# The ranks meet at the first node, on a port that two jobs of one node hardly share.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT
# Since SLURM 22.05 srun no longer takes over the job's CPUs a task by itself.
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

# A rank that dies takes the others with it; they would wait for it for ever.
srun --kill-on-bad-exit=1 --wait=60 python train/main.py "$@"
