"""How good a memory is: tasks, read and checked; their examples, each under its own memory; figures with errors.

    (task,) = find_tasks(["piqa"], data)                 # tasks: the paper's, question files, texts
    run = Evaluation(model, out).run(task, "fetched")    # runner: a row an example, appended to a file of `out`
    compare([before, after])                             # compare: paired differences

The protocol is the paper's (arXiv:2510.02375, App. B), which is LLM-Foundry's with a memory for each example.
Little is computed in vain: a context that several continuations share is computed once (`scoring`), only predicted
positions go through the output projection, and a reply ends when its score is decided (`answers`).
"""
