"""The roles of a run as Ray actors: `pipeline/` holds what they compute, this package who does it, where, and what
happens when one dies.

Who calls whom; what is in brackets is an actor, and runs in a process of its own:

    [controller] ── train_loop ─┬─ batch_builder ─┐                     pipeline.rl.ledger: admission, order, ends
                                │                 ├─► dispatcher ─┬─ worker_pool ──► [rollout_worker]
                                ├─ evaluation ────┘               ├─ score_batcher ── worker_pool ──► [reward_server]
                                │                                 └─ pool_supervisor ── autoscale
                                ├─ learner_group ──► [learner_rank] ...
                                └─ step_recorder ── prometheus

    group_run        the record of a group's progress          ray_options   how actors are started and called
    request_queue    requests that wait for a worker           ray_errors    from Ray's exceptions to one line
    role_actor       what all actors share

The life of a group (`group_run.GroupState`, and the ledger's states around it):

    admitted ──► WAITING ──► ROLLOUT ──► SCORING ──► SCORED ──► trained | filtered
                   ▲ ▲          │           │ ▲         │
                   │ └──────────┘           └─┘         │
                   │  rollout failed    scoring failed  │
                   └────────────────────────┴───────────┘   takes lost with their node

Every failure of the group's own uses an attempt; with none left it ends as failed, with a reason. What a pre-empted
worker hands back, and groups of a shared call that fails as a whole, are tried again uncounted.
"""
