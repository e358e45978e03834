"""One optimizer step as verl's worker gets it, made by the plan that trains: for the loss's and the engine's tests."""
