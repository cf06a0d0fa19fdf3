"""Many side networks answered on one backbone, over HTTP.

    http.py       requests and answers, OpenAI's and our own                       asks
    engine.py     which rows run together, when they join and leave                runs in one thread
    passes.py     what one pass computes, for the backbone and each side network   knows the boundary alone
    rows.py       keys and values of rows of different lengths
    networks.py   side networks by name: read, kept, replaced, let go

A request is a row. All rows run through the backbone together, one token at a time, whichever side network answers them; the side
networks then each run on their own rows. A row joins and leaves at any token.
"""
