"""What the test cluster is configured with: slurm.conf, a node's first process, and the clients that step inside."""

CONF = """
ClusterName=smoltest
SlurmctldHost=slurmctl({net}.1)
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job waits before it may start again (Slurm's default: 120 s)
AuthInfo=socket={dir}/munge.sock,cred_expire=5
SlurmUser=root
SlurmdUser=root
StateSaveLocation={dir}/state
SlurmdSpoolDir={dir}/%n
SlurmctldPidFile={dir}/slurmctld.pid
SlurmdPidFile={dir}/%n.pid
SlurmctldLogFile={dir}/slurmctld.log
SlurmdLogFile={dir}/%n.log
PlugStackConfig={dir}/plugstack.conf
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
AccountingStorageType=accounting_storage/none
SchedulerType=sched/backfill
# Slurm holds a job that lost its nodes five times, which is little for weeks (docs/operations.md).
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=100
GresTypes=gpu
SlurmdParameters=config_overrides
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=10
KillWait=10
# A step's daemon on a healthy node waits this long for the srun of a frozen one, and drains the healthy node after.
UnkillableStepTimeout=240
MinJobAge=86400
JobRequeue=1
TreeWidth=50
{nodes}
PartitionName=batch Nodes=ALL Default=YES MaxTime=1-00:00:00 DefaultTime=60 PriorityTier=1 GraceTime=20
PartitionName=urgent Nodes=ALL MaxTime=1-00:00:00 DefaultTime=60 PriorityTier=10
"""
NODE = "NodeName={name} NodeHostname={name} NodeAddr={address} Port={port} SocketsPerBoard=1 CoresPerSocket=96 RealMemory=1000000 Gres=gpu:h100:8 State=UNKNOWN\n"
# Runs as process 1 of a node: waits for its link, makes the node look like one, and stays to reap orphans.
NODE_INIT = """
while [ ! -e {dir}/{name}.linked ]; do sleep 0.05; done
hostname {name}; mount -t proc proc /proc; mount --bind {dir}/hosts /etc/hosts; mount -t tmpfs tmpfs /dev/shm
ip link set lo up; ip addr add {address}/24 dev eth0; ip link set eth0 up
cd /; export SLURM_CONF={dir}/slurm.conf
slurmd -D -N {name} & while :; do wait; sleep 1; done
"""
# In a job one is inside already; from the machine one steps in. (The cluster's own processes hold SLURM_CONF.)
CLIENT = """#!/bin/sh
export SLURM_CONF={dir}/slurm.conf
[ -n "$SLURM_JOB_ID" ] && exec {real} "$@"
exec nsenter --net=/proc/{pid}/ns/net {real} "$@"
"""
