"""Caption engines behind one interface; `stages.recaption` picks one by name."""
