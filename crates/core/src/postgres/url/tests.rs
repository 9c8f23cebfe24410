use super::*;

fn nothing(_: &str) -> Option<String> {
    None
}

fn servers(url: &str) -> Result<Servers, Error> {
    read(url, &nothing)
}

fn shown(url: &str) -> String {
    let servers = servers(url).unwrap_or_else(|error| panic!("{url}: {}", error.report()));
    format!("{servers:?}")
}

fn refused(url: &str) -> String {
    let error = servers(url).err().unwrap_or_else(|| panic!("{url} is taken"));
    assert_eq!(error.kind(), ErrorKind::Config);
    error.report()
}

fn only(url: &str) -> PgConnectOptions {
    servers(url).unwrap_or_else(|error| panic!("{url}: {}", error.report())).one()
}

#[test]
fn unknown_words_are_refused_by_name_and_without_their_value() {
    for (parameters, named, meant) in [
        ("sslmod=hunter2", "sslmod ", "sslmode"),
        ("ssl_mode=hunter2", "ssl_mode", "sslmode"),
        ("SSLMODE=hunter2", "SSLMODE", "sslmode"),
        ("sslMode=hunter2", "sslMode", "sslmode"),
        ("sslmode =hunter2", "not shown", ""),
        ("currentSchema=hunter2", "currentSchema", ""),
        ("ssl=hunter2", "ssl in DATABASE_URL", "true"),
        ("sslmode=hunter2", "sslmode in DATABASE_URL", "verify-full"),
        ("sslmode=Verify-Full", "sslmode", "verify-full"),
        ("sslmode=verify_full", "sslmode", "verify-full"),
        ("sslmode=", "sslmode", "verify-full"),
        ("sslmode", "no value", ""),
        ("sslmode=verify-full&sslmode=disable", "twice", ""),
        ("sslmode=verify-full&ssl-mode=disable", "twice", ""),
        ("sslmode=verify-full&ssl=true", "ssl in DATABASE_URL", ""),
        ("target_session_attrs=hunter2", "target_session_attrs", "read-write"),
        ("connect_timeout=hunter2", "connect_timeout", "3600"),
        ("port=hunter2", "port", ""),
        ("hostaddr=hunter2", "hostaddr", ""),
    ] {
        let report = refused(&format!("postgres://me:hunter2@db/shop?{parameters}"));
        assert!(report.contains(named) && report.contains(meant), "{parameters}: {report}");
        assert!(!report.contains("hunter2"), "{report}");
    }
}

#[test]
fn what_libpq_knows_and_we_do_not_is_named_as_unsupported() {
    for parameters in [
        "sslmode=allow",
        "channel_binding=require",
        "gssencmode=require",
        "require_auth=scram-sha-256",
        "requirepeer=postgres",
        "sslcrl=/etc/crl",
        "sslpassword=hunter2",
        "service=shop",
        "passfile=/etc/pass",
        "keepalives_idle=10",
        "load_balance_hosts=random",
        "ssl_min_protocol_version=TLSv1.3",
        "sslnegotiation=direct",
        "replication=database",
    ] {
        let (name, value) = parameters.split_once('=').unwrap();
        let report = refused(&format!("postgres://me@db/shop?{parameters}"));
        assert!(report.contains(name) && report.contains("support") && !report.contains("hunter2"), "{report}");
        assert!(value == "allow" || !report.contains(value), "{report}");
    }
}

#[test]
fn other_schemes_are_refused_by_name() {
    for (url, named) in [
        ("jdbc:postgresql://me:hunter2@db/prod", "jdbc"),
        ("mysql://me:hunter2@db/prod", "mysql"),
        ("Postgres://me:hunter2@db/prod", "Postgres"),
        ("me:hunter2@db/prod", "postgres://user"),
        ("hunter2", "postgres://user"),
        ("host=db password=hunter2", "postgres://user"),
        ("me:hunter2://db", "postgres://user"),
    ] {
        let report = refused(url);
        assert!(report.contains(named) && report.contains("DATABASE_URL"), "{report}");
        assert!(!report.contains("hunter2"), "{report}");
    }
}

#[test]
fn variables_are_read_as_libpqs_words_are() {
    for (name, value, named) in [
        ("PGSSLMODE", "verify_full", "PGSSLMODE"),
        ("PGSSLMODE", "VERIFY-FULL", "PGSSLMODE"),
        ("PGSSLMODE", "allow", "PGSSLMODE"),
        ("PGPORT", "hunter2", "PGPORT"),
        ("PGTARGETSESSIONATTRS", "hunter2", "PGTARGETSESSIONATTRS"),
        ("PGCHANNELBINDING", "require", "PGCHANNELBINDING"),
        ("PGREQUIREAUTH", "hunter2", "PGREQUIREAUTH"),
        ("PGSERVICE", "hunter2", "PGSERVICE"),
        ("PGSSLROOTCERT", "/nowhere/ca", "PGSSLROOTCERT"),
        ("PGPASSFILE", "/nowhere/pgpass", "PGPASSFILE"),
    ] {
        let variable = |wanted: &str| (wanted == name).then(|| value.to_string());
        let report = read("postgres://me@db/shop", &variable).unwrap_err().report();
        assert!(report.contains(named) && !report.contains("hunter2"), "{report}");
        // What is set to nothing is as good as not set.
        read("postgres://me@db/shop", &|wanted| (wanted == name).then(String::new)).unwrap();
    }
    let variable = |name: &str| match name {
        "PGSSLMODE" => Some("verify-full".to_string()),
        "PGHOST" => Some("one,two".into()),
        "PGPORT" => Some("1,2".into()),
        _ => None,
    };
    assert!(matches!(read("postgres://me@db/shop", &variable), Err(error) if error.report().contains("PGPORT")));
    assert_eq!(format!("{:?}", read("postgres://me@/shop", &variable).unwrap()), r#"["one:1", "two:2"]"#);
    let both = read("postgres://me@db:5/shop?sslmode=require", &variable).unwrap().one();
    assert!(matches!(both.get_ssl_mode(), PgSslMode::Require), "the URL comes first");
    let from_variable = read("postgres://me@db:5/shop", &variable).unwrap().one();
    assert!(matches!(from_variable.get_ssl_mode(), PgSslMode::VerifyFull));
}

#[test]
fn hosts_are_found_wherever_they_stand() {
    for (url, places) in [
        ("postgres://u@[::1]:5432/db", r#"["[::1]:5432"]"#),
        ("postgres://u:p@[fe80::1%25eth0]:1/db", r#"["[fe80::1%eth0]:1"]"#),
        ("postgres://u@[::1]:1,db:2,127.0.0.1:3/x", r#"["[::1]:1", "db:2", "127.0.0.1:3"]"#),
        ("postgresql://u@one,two:7/db", r#"["one:5432", "two:7"]"#),
        ("postgres://u@/db?host=one,two&port=7", r#"["one:7", "two:7"]"#),
        ("postgres://u@/db?host=::1&port=7", r#"["[::1]:7"]"#),
        ("postgres://u@one:7/db?host=two", r#"["two:7"]"#),
        ("postgres:///db?hostaddr=10.0.0.1,10.0.0.2", r#"["10.0.0.1:5432", "10.0.0.2:5432"]"#),
        ("postgres://u@%2Frun%2Fpostgresql:7/db", r#"["/run/postgresql/.s.PGSQL.7"]"#),
        ("postgres://localhost?host=/run/postgresql", r#"["/run/postgresql/.s.PGSQL.5432"]"#),
        ("postgres://one?user=me", r#"["one:5432"]"#),
        ("  postgres://one/db\n", r#"["one:5432"]"#),
    ] {
        assert_eq!(shown(url), places, "{url}");
    }
    for url in [
        "postgres://u@::1/db",
        "postgres://u@[::1/db",
        "postgres://u@[::1]5432/db",
        "postgres://u@one:0/db",
        "postgres://u@one:65536/db",
        "postgres://u@one,,two/db",
        "postgres://u@o ne/db",
        "postgres://u@one/db?host=two&hostaddr=10.0.0.1",
        "postgres://u@one,two/db?port=1,2,3",
        "postgres://u@one/db/more",
        "postgres://u@one/%00",
        "postgres://u@one/100%",
    ] {
        refused(url);
    }
}

#[test]
fn a_password_may_hold_what_is_encoded_and_some_that_is_not() {
    for url in [
        "postgres://me@x:p%2F%40%3A%25@db:1/shop",
        "postgres://me:pa?ss&word=1@db:1/shop",
        "postgres://me:pa#ss@db:1/shop",
    ] {
        assert_eq!(shown(url), r#"["db:1"]"#);
    }
    assert_eq!(only("postgres://me%40x:p@db/sh%20op").get_username(), "me@x");
    assert_eq!(only("postgres://me%40x:p@db/sh%20op").get_database(), Some("sh op"));
}

#[test]
fn a_piece_of_a_password_that_is_not_encoded_is_not_shown() {
    for url in [
        "postgres://me:hunter2/x@db/shop",
        "postgres://me:12/hunter2@db/shop",
        "postgres://me:hunter2",
        "postgres://me:12/x?hunter2=1@db/shop",
        "postgres://me:12/x?sslrootcert=hunter2@db/shop",
        "postgres://me:p@x@hunter2 2:7/shop",
        "postgres://me@db/shop?dbname=postgres://me:hunter2@db/shop",
        "postgres://me:hunter2%zz@db/shop",
        "postgres://me:hunter2%ff@db/shop",
    ] {
        let report = refused(url);
        assert!(!report.contains("hunter2"), "{url}: {report}");
    }
}

#[test]
fn tls_is_what_libpqs_words_say() {
    let mode = |url: &str| format!("{:?}", only(url).get_ssl_mode());
    for (parameters, expected) in [
        ("", "Prefer"),
        ("?sslmode=disable", "Disable"),
        ("?sslmode=require", "Require"),
        ("?ssl-mode=verify-ca", "VerifyCa"),
        ("?ssl=true", "Require"),
        ("?sslmode=verify-full&sslrootcert=system", "VerifyFull"),
        ("?sslrootcert=system", "VerifyFull"),
        // A file of authorities says that the server is to be verified.
        ("?sslmode=require&sslrootcert=Cargo.toml", "VerifyCa"),
        ("?sslmode=require&sslrootcert=-----BEGIN%20CERTIFICATE-----", "VerifyCa"),
    ] {
        assert_eq!(mode(&format!("postgres://me@db/shop{parameters}")), expected, "{parameters}");
    }
    assert_eq!(mode("postgres:///db?host=/run/postgresql&sslmode=verify-full"), "Disable", "a socket has no TLS");
    assert!(refused("postgres://me@db/shop?sslmode=require&sslrootcert=system").contains("verify-full"));
    assert!(refused("postgres://me@db/shop?sslcert=Cargo.toml").contains("sslkey"));
    assert!(refused("postgres://me@db/shop?sslkey=Cargo.toml").contains("sslcert"));
    assert!(refused("postgres://me@db/shop?sslrootcert=").contains("sslrootcert"));
}

#[test]
fn what_goes_to_the_server_is_what_was_written() {
    let options = only("postgres://me@db/shop?options=-c%20a%3Db+c&options[x]=y&application_name=our%20shop");
    assert_eq!(options.get_options(), Some("-c a=b+c -c x=y"));
    assert_eq!(options.get_application_name(), Some("our shop"));
}
