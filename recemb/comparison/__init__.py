"""Methods against each other: studies of many trainings, their tables, figures and what to conclude."""
