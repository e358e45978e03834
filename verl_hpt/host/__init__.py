"""All that knows verl; the rooms around it do not."""
