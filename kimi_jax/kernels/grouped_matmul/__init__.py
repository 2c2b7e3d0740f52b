"""Matrix products of rows with their group's weight, packed int4 or plain."""
