-- The relay marks what it publishes out of order with `Aftercommit-*`, and readers leave such headers out of an event: a
-- publisher's own would be taken for the relay's. Not valid, so that the rows that are there are not looked through.
-- [iI], because there are languages in which the one is not the other's upper case.
alter table aftercommit.outbox
    drop constraint outbox_header_names_are_not_reserved,
    add constraint outbox_header_names_are_not_reserved check (
        not headers @? '$.keyvalue() ? (@.key like_regex "^(nats|ce|aftercomm[iI]t)-" flag "i")') not valid;
