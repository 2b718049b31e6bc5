"""Settings of every program, apart from the code that they steer: nothing here needs torch, so help and errors come at once."""
