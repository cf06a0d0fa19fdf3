"""Many side networks answered on one backbone, over HTTP.

    http.py        routes; forms.py how answers are written, measures.py           ask
    answers.py     from a request to rows, and from tokens to text                 for http.py
    engine.py      which rows run together, when they join and leave (jobs.py)     runs in one thread
    reading.py     prompts: equal ones once, those of lately not again             \\
    scoring.py     how likely labels are                                            | what a round does
    answering.py   side networks of one shape together (stacked.py)                /
    passes.py      what one pass computes, for the backbone and each side network  knows the boundary alone
    ranks.py       a backbone divided over ranks: rank 0 tells the others of each pass
    rows.py        keys and values of rows of different lengths
    networks.py    side networks by name: read, kept, replaced, let go

A request is a row. All rows run through the backbone together, one token at a time, whichever side network answers them; the side
networks then each run on their own rows. A row joins and leaves at any token.
"""
