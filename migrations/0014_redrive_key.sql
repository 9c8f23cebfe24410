-- Live events of a key wait while rows of it were sent back to their subscriber. By the key alone a busy key of one subscriber held
-- up all the others that have it. A hash, because the keys of foreign publishers may be long.

drop index aftercommit.redrive_key;
create index redrive_key on aftercommit.redrive (subscriber, hashtextextended(key, 0));
