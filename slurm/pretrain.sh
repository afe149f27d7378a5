#!/usr/bin/env bash
# Pretrains on a SLURM cluster: one Python process a GPU, started by srun.
#
#   sbatch slurm/pretrain.sh                                             # configs/base.yaml
#   sbatch slurm/pretrain.sh --config configs/demo.yaml phases.main.lr.peak=1e-3
#   sbatch --ntasks-per-node=2 --gpus-per-node=0 --cpus-per-task=1 slurm/pretrain.sh ...  # no GPU
#
# Every task sees all GPUs of its node and takes that of its local rank; with --gpus-per-task=1 instead
# of --gpus-per-node each sees its own.
#
# Submit from the root of the checkout, whose .venv holds the environment. Options of sbatch given
# on its command line win over the ones below. The log is slurm-JOBID.log in the same folder.
#SBATCH --job-name=clinical-modernbert
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --output=slurm-%j.log
#SBATCH --open-mode=append
set -euo pipefail

source .venv/bin/activate

# The ranks meet at the first node, on a port that two jobs of one node hardly share.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT
# Since SLURM 22.05 srun no longer takes over the job's CPUs a task by itself.
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

# A rank that dies takes the others with it; they would wait for it for ever.
srun --kill-on-bad-exit=1 --wait=60 python train/main.py "$@"
