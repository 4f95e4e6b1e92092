"""The trainer: run it as `python -m train`, or as `softclip-train` where it is installed, as package softclip_train.

To read it, begin with step, the training step on one page, then run (set-up, loop, end) and options (every one).

    cli, config, options, auto
                              the command line, the options, and what `auto` means
    launch, world, threads    the processes of a job, and what they do together
    run, set_up, step         a whole run, what comes before it, and one step of it
    targets, teachers         what a batch should match at a step, and who makes the soft targets
    towers/                   what is trained, from whichever library
    engine, deepspeed_options, optimizers
                              DeepSpeed's engine, and what it is made with
    engine_state, engine_files
                              what an engine holds, and its part of a checkpoint
    data/                     what it is trained on, from whichever layout; data/emoji/ is the default set
    evaluate/                 retrieval, zero-shot and a linear probe on held-out data: `python -m train evaluate`
    export/                   the towers in forms that others load: `python -m train export`
    study/                    many runs, and what they differ by: `python -m train grid` and `compare`
    checkpoint, fingerprint   checkpoints, and the data, teachers, code and versions that they were made with
    resume                    whether a run may go on from one
    metrics, console, tracker, plot
                              logs, progress bar, and curves: `python -m train plot`
    heartbeat, signals, lock  who is alive, who was asked to stop, and who holds the run
    files                     crash-safe writes
"""

PROGRAM = "softclip-train" if __name__ == "softclip_train" else f"python -m {__name__}"  # as messages name it
