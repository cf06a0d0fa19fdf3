"""What a run answers to the tasks of lm-evaluation-harness: `lst-scale eval`.

    run.py      reads top to bottom: tasks, then the model, then numbers
    tasks.py    names to tasks, and what is refused of them
    subject.py  a finished run, a saved side network or a bare backbone, and how it reads text
    model.py    lm_eval's face of a subject: text to token ids as its own models do it
    pairs.py    how likely continuations are; each prompt is read once for all of its own
    writing.py  text that is written

lm_eval is imported in tasks.py, model.py, writing.py and run.py alone, and only when a command needs it.
"""
