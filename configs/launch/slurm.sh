#!/bin/bash
# Several machines under SLURM, one task a GPU; goes on by itself after the time limit, and after preemption or a dead
# node where SLURM requeues the job then (PreemptMode=REQUEUE; JobRequeue, or --requeue as below).
#
#   sbatch configs/launch/slurm.sh configs/cc12m_10x.yaml [options of dtpvit fit]
#
# Before the time limit SLURM sends SIGUSR1: the run ends after its step, writes last.ckpt and requeues its job, which
# starts this script again. Checkpoints of each 1,000 steps are for what comes without warning (docs/launch.md).
# Adapt what stands between the lines.
# ---------------------------------------------------------------------------------------------------------------------
#SBATCH --job-name=dtpvit
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=10
#SBATCH --time=12:00:00
# ---------------------------------------------------------------------------------------------------------------------
# Seconds that a step, and writing a checkpoint, may take. To the tasks alone: no B: before USR1.
#SBATCH --signal=USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
config=${1:?"usage: sbatch $0 CONFIG [options of dtpvit fit]"}
shift
# All tasks of a machine share its cores: one thread each beside the loader's processes (--data.init_args.num_workers).
export OMP_NUM_THREADS=1
exec srun --kill-on-bad-exit=1 dtpvit fit --config "$config" --config configs/launch/ddp.yaml \
  --checkpoint.every_n_train_steps 1000 --ckpt_path last "$@"
