#!/usr/bin/env bash
# Starts a real two-node SLURM on this one machine, for tests; needs root, slurm-wlm and munge.
# The nodes n1 and n2 have two CPUs and two GPUs each; the GPUs are stand-in devices. Job arrays may
# have four tasks, where SLURM's default is 1,001, so that stages of tests are several arrays.
set -euo pipefail

conf=/etc/slurm
mkdir -p "$conf" /run/munge /var/spool/slurmctld /var/spool/slurmd-n1 /var/spool/slurmd-n2
for gpu in 0 1; do
  [ -e "/dev/standin$gpu" ] || mknod "/dev/standin$gpu" c 1 3
done
# On a real cluster the names of the nodes resolve.
grep -q ' n1 n2$' /etc/hosts || echo '127.0.0.1 n1 n2' >> /etc/hosts
host=$(hostname -s)
cat > "$conf/slurm.conf" <<EOF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
ReturnToService=2
JobRequeue=1
MaxArraySize=4
MpiDefault=none
StateSaveLocation=/var/spool/slurmctld
SlurmdSpoolDir=/var/spool/slurmd-%n
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd-%n.pid
SlurmctldLogFile=/var/log/slurmctld.log
SlurmdLogFile=/var/log/slurmd-%n.log
GresTypes=gpu
NodeName=n[1-2] NodeHostname=$host NodeAddr=127.0.0.1 Port=[7001-7002] CPUs=2 RealMemory=4000 Gres=gpu:2 State=UNKNOWN
PartitionName=test Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
EOF
echo 'NodeName=n[1-2] Name=gpu File=/dev/standin[0-1]' > "$conf/gres.conf"

chown munge:munge /run/munge
[ -e /etc/munge/munge.key ] || { dd if=/dev/urandom of=/etc/munge/munge.key bs=1 count=1024 status=none; }
chown munge:munge /etc/munge/munge.key && chmod 400 /etc/munge/munge.key
pgrep -x munged > /dev/null || runuser -u munge -- munged
pgrep -x slurmctld > /dev/null || slurmctld
for node in n1 n2; do
  pgrep -f "slurmd -N $node" > /dev/null || slurmd -N "$node"
done

for _ in $(seq 60); do
  [ "$(sinfo -h -t idle -o %D)" = 2 ] && exit 0
  sleep 1
done
sinfo
echo "the nodes did not become idle within 60 s; see /var/log/slurmctld.log" >&2
exit 1
