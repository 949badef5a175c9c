"""Update rules and learning-rate schedules by name.  Tables and arithmetic only; `optim.build` knows torch."""
