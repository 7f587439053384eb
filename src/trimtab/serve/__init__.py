"""An adapted model at work: embedding jobs, indexes that are searched, export, the server. Never training."""
