//! The environment variables of OpenTelemetry that count, and what they say.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use hyper::Uri;
use hyper::header::{HeaderName, HeaderValue};
use opentelemetry_sdk::trace::Sampler;
use percent_encoding::percent_decode_str;

use aftercommit_core::config::{ClientCertificate, Secret};
use aftercommit_core::error::{Error, ErrorKind};

/// The value of a variable; none when it is not set.
type Environment<'e> = &'e dyn Fn(&str) -> Option<String>;

/// What is exported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Signal {
    Traces,
    Metrics,
    Logs,
}

impl Signal {
    /// As it is called in the names of variables.
    fn upper(self) -> String {
        self.to_string().to_uppercase()
    }
}

impl fmt::Display for Signal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Traces => "traces",
            Self::Metrics => "metrics",
            Self::Logs => "logs",
        })
    }
}

/// Where a signal goes.
pub(super) struct Target {
    pub(super) url: String,
    pub(super) timeout: Duration,
    /// Sensitive.
    pub(super) headers: Vec<(HeaderName, HeaderValue)>,
    pub(super) ca: Option<PathBuf>,
    pub(super) certificate: Option<ClientCertificate>,
}

/// What is exported where. Each signal is none when it is not.
pub(super) struct Settings {
    pub(super) traces: Option<Target>,
    pub(super) metrics: Option<Target>,
    pub(super) logs: Option<Target>,
    pub(super) service_name: Option<String>,
    pub(super) sampler: Sampler,
    pub(super) metric_interval: Duration,
    /// The most spans that wait.
    pub(super) span_queue: usize,
    /// The most log records that wait.
    pub(super) log_queue: usize,
}

impl Settings {
    /// Reads the environment; none when nothing is to be exported.
    pub(super) fn read(environment: Environment<'_>) -> Result<Option<Self>, Error> {
        let variables = Variables(environment);
        if variables.text("OTEL_SDK_DISABLED").is_some_and(|text| text.eq_ignore_ascii_case("true")) {
            return Ok(None);
        }
        let traces = variables.target(Signal::Traces)?;
        let metrics = variables.target(Signal::Metrics)?;
        let logs = variables.target(Signal::Logs)?;
        if traces.is_none() && metrics.is_none() && logs.is_none() {
            return Ok(None);
        }
        Ok(Some(Self {
            traces,
            metrics,
            logs,
            service_name: variables.text("OTEL_SERVICE_NAME"),
            sampler: variables.sampler()?,
            metric_interval: variables.milliseconds("OTEL_METRIC_EXPORT_INTERVAL", 60_000)?,
            span_queue: variables.size("OTEL_BSP_MAX_QUEUE_SIZE")?,
            log_queue: variables.size("OTEL_BLRP_MAX_QUEUE_SIZE")?,
        }))
    }
}

struct Variables<'e>(Environment<'e>);

impl Variables<'_> {
    /// A variable that is set to nothing is not set.
    fn text(&self, name: &str) -> Option<String> {
        (self.0)(name).map(|text| text.trim().to_string()).filter(|text| !text.is_empty())
    }

    /// The signal's own variable, or the one for all signals; with the name of the one that counts.
    fn of(&self, signal: Signal, what: &str) -> Option<(String, String)> {
        let names = [format!("OTEL_EXPORTER_OTLP_{}_{what}", signal.upper()), format!("OTEL_EXPORTER_OTLP_{what}")];
        names.into_iter().find_map(|name| self.text(&name).map(|text| (name, text)))
    }

    fn target(&self, signal: Signal) -> Result<Option<Target>, Error> {
        let exporter = format!("OTEL_{}_EXPORTER", signal.upper());
        match self.text(&exporter).as_deref() {
            None | Some("otlp") => {}
            Some("none") => return Ok(None),
            Some(other) => {
                let hint = if other == "prometheus" { "; metrics for Prometheus are served with --http" } else { "" };
                return Err(refuse(format!("{exporter}={other} is not known: it is otlp or none{hint}")));
            }
        }
        let own = format!("OTEL_EXPORTER_OTLP_{}_ENDPOINT", signal.upper());
        let (name, url) = match (self.text(&own), self.text("OTEL_EXPORTER_OTLP_ENDPOINT")) {
            (Some(url), _) => (own, url),
            (None, Some(base)) => {
                ("OTEL_EXPORTER_OTLP_ENDPOINT".into(), format!("{}/v1/{signal}", base.trim_end_matches('/')))
            }
            (None, None) => return Ok(None),
        };
        check_url(&url).map_err(|problem| refuse(format!("{name} cannot be used: {problem}")))?;
        self.check_protocol(signal)?;
        let timeout = match self.of(signal, "TIMEOUT") {
            Some((name, _)) => self.milliseconds(&name, 10_000)?,
            None => Duration::from_secs(10),
        };
        let (ca, certificate) = self.certificates(signal)?;
        Ok(Some(Target { url, timeout, headers: self.headers(signal)?, ca, certificate }))
    }

    fn check_protocol(&self, signal: Signal) -> Result<(), Error> {
        if let Some((name, protocol)) = self.of(signal, "PROTOCOL").filter(|(_, protocol)| protocol != "http/protobuf")
        {
            let hint = if protocol == "grpc" { ", which collectors take at port 4318" } else { "" };
            return Err(refuse(format!("{name}={protocol} is not spoken here: set it to http/protobuf{hint}")));
        }
        match self.of(signal, "COMPRESSION") {
            Some((name, compression)) if compression != "none" => {
                Err(refuse(format!("{name}={compression} is not known here: leave it away, or set it to none")))
            }
            _ => Ok(()),
        }
    }

    fn certificates(&self, signal: Signal) -> Result<(Option<PathBuf>, Option<ClientCertificate>), Error> {
        let path = |what| self.of(signal, what).map(|(_, path)| PathBuf::from(path));
        let certificate = match (path("CLIENT_CERTIFICATE"), path("CLIENT_KEY")) {
            (Some(certificate), Some(key)) => Some(ClientCertificate { certificate, key }),
            (None, None) => None,
            _ => {
                let problem = "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE and OTEL_EXPORTER_OTLP_CLIENT_KEY need each other";
                return Err(refuse(problem));
            }
        };
        Ok((path("CERTIFICATE"), certificate))
    }

    /// What is wrong with headers is told without them: they are secrets.
    fn headers(&self, signal: Signal) -> Result<Vec<(HeaderName, HeaderValue)>, Error> {
        const FILE: &str = "OTEL_EXPORTER_OTLP_HEADERS_FILE";
        let (name, text) = match (self.of(signal, "HEADERS"), self.text(FILE)) {
            (Some((name, _)), Some(_)) => {
                return Err(refuse(format!("{name} and {FILE} are both set: take one of them away")));
            }
            (Some(given), None) => given,
            (None, Some(file)) => (FILE.into(), Secret::File(file.into()).read(FILE)?),
            (None, None) => return Ok(Vec::new()),
        };
        let entries = text.split([',', '\n']).map(str::trim).filter(|entry| !entry.is_empty());
        let header = |(at, entry): (usize, &str)| {
            parse_header(entry).ok_or_else(|| {
                refuse(format!("{name} cannot be used: entry {} is not a header of the form name=value", at + 1))
            })
        };
        entries.enumerate().map(header).collect()
    }

    fn sampler(&self) -> Result<Sampler, Error> {
        let Some(name) = self.text("OTEL_TRACES_SAMPLER") else {
            return Ok(Sampler::ParentBased(Box::new(Sampler::AlwaysOn)));
        };
        let root = match name.strip_prefix("parentbased_").unwrap_or(&name) {
            "always_on" => Sampler::AlwaysOn,
            "always_off" => Sampler::AlwaysOff,
            "traceidratio" => Sampler::TraceIdRatioBased(self.ratio()?),
            _ => {
                return Err(refuse(format!(
                    "OTEL_TRACES_SAMPLER={name} is not known: it is always_on, always_off or traceidratio, or one of them \
                     with parentbased_ in front"
                )));
            }
        };
        Ok(if name.starts_with("parentbased_") { Sampler::ParentBased(Box::new(root)) } else { root })
    }

    fn ratio(&self) -> Result<f64, Error> {
        let Some(text) = self.text("OTEL_TRACES_SAMPLER_ARG") else { return Ok(1.0) };
        let ratio = text.parse::<f64>().ok().filter(|ratio| (0.0..=1.0).contains(ratio));
        ratio.ok_or_else(|| refuse(format!("OTEL_TRACES_SAMPLER_ARG={text} is not a number from 0 to 1")))
    }

    fn milliseconds(&self, name: &str, default: u64) -> Result<Duration, Error> {
        let Some(text) = self.text(name) else { return Ok(Duration::from_millis(default)) };
        match text.parse() {
            Ok(milliseconds @ 1..) => Ok(Duration::from_millis(milliseconds)),
            _ => Err(refuse(format!("{name}={text} is not a number of milliseconds"))),
        }
    }

    fn size(&self, name: &str) -> Result<usize, Error> {
        let Some(text) = self.text(name) else { return Ok(2_048) };
        match text.parse() {
            Ok(size @ 1..=1_000_000) => Ok(size),
            _ => Err(refuse(format!("{name}={text} is not a number from 1 to 1000000"))),
        }
    }
}

/// Without what is in it: some write a password there.
fn check_url(url: &str) -> Result<(), &'static str> {
    let uri: Uri = url.parse().map_err(|_| "it is not a URL such as http://collector:4318")?;
    if !matches!(uri.scheme_str(), Some("http" | "https")) {
        return Err("it must begin with http:// or https://");
    }
    match uri.authority() {
        Some(authority) if !authority.host().is_empty() && !authority.as_str().contains('@') => Ok(()),
        _ => Err("it must name a host, and no user: log in with OTEL_EXPORTER_OTLP_HEADERS"),
    }
}

fn parse_header(entry: &str) -> Option<(HeaderName, HeaderValue)> {
    let (name, value) = entry.split_once('=')?;
    let value = percent_decode_str(value.trim()).decode_utf8().ok()?;
    let mut value = HeaderValue::try_from(&*value).ok()?;
    value.set_sensitive(true);
    Some((HeaderName::try_from(name.trim()).ok()?, value))
}

fn refuse(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Config, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(variables: &[(&str, &str)]) -> Result<Option<Settings>, Error> {
        let value = |name: &str| variables.iter().find(|(own, _)| *own == name).map(|(_, value)| value.to_string());
        Settings::read(&value)
    }

    const BASE: (&str, &str) = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4318/");

    fn some(more: &[(&str, &str)]) -> Settings {
        read(&[&[BASE], more].concat()).unwrap().unwrap()
    }

    #[test]
    fn nothing_is_exported_without_an_endpoint() {
        assert!(read(&[]).unwrap().is_none());
        assert!(read(&[("OTEL_EXPORTER_OTLP_ENDPOINT", " ")]).unwrap().is_none());
        assert!(read(&[("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")]).unwrap().is_none());
        assert!(read(&[BASE, ("OTEL_SDK_DISABLED", "TRUE")]).unwrap().is_none());
        let none = ["OTEL_TRACES_EXPORTER", "OTEL_METRICS_EXPORTER", "OTEL_LOGS_EXPORTER"].map(|name| (name, "none"));
        assert!(read(&[&[BASE], &none[..]].concat()).unwrap().is_none());
    }

    #[test]
    fn each_signal_has_its_own_way_or_the_common_one() {
        let url = |target: Option<Target>| target.unwrap().url;
        let settings = some(&[("OTEL_EXPORTER_OTLP_LOGS_ENDPOINT", "https://logs.example/in")]);
        assert_eq!(url(settings.traces), "http://collector:4318/v1/traces");
        assert_eq!(url(settings.metrics), "http://collector:4318/v1/metrics");
        assert_eq!(url(settings.logs), "https://logs.example/in");
        let settings = some(&[("OTEL_METRICS_EXPORTER", "none"), ("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "250")]);
        assert!(settings.metrics.is_none());
        assert_eq!(settings.traces.unwrap().timeout, Duration::from_millis(250));
        assert_eq!(settings.logs.unwrap().timeout, Duration::from_secs(10));
    }

    #[test]
    fn headers_are_read_as_the_specification_writes_them() {
        let target = some(&[("OTEL_EXPORTER_OTLP_HEADERS", "api-key=a%20b=c , x-tenant=1")]).traces.unwrap();
        let headers: Vec<_> = target.headers.iter().map(|(name, value)| (name.as_str(), value.as_bytes())).collect();
        assert_eq!(headers, [("api-key", &b"a b=c"[..]), ("x-tenant", b"1")]);
        assert!(target.headers.iter().all(|(_, value)| value.is_sensitive()));
    }

    #[test]
    fn a_sampler_is_taken_as_it_is_named() {
        let sampler = |name, arg| {
            let arg = [("OTEL_TRACES_SAMPLER", name), ("OTEL_TRACES_SAMPLER_ARG", arg)];
            format!("{:?}", some(&arg).sampler)
        };
        assert_eq!(sampler("", ""), "ParentBased(AlwaysOn)");
        assert_eq!(sampler("always_off", ""), "AlwaysOff");
        assert_eq!(sampler("parentbased_traceidratio", "0.01"), "ParentBased(TraceIdRatioBased(0.01))");
    }

    #[test]
    fn what_cannot_be_used_is_refused_by_name_and_without_secrets() {
        for (name, value) in [
            ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
            ("OTEL_EXPORTER_OTLP_LOGS_PROTOCOL", "http/json"),
            ("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip"),
            ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "collector:4318"),
            ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://me:hunter2@collector"),
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "10s"),
            ("OTEL_EXPORTER_OTLP_HEADERS", "hunter2"),
            ("OTEL_EXPORTER_OTLP_HEADERS", "a=1,b c=hunter2"),
            ("OTEL_EXPORTER_OTLP_HEADERS", "a=hunter2%0a"),
            ("OTEL_EXPORTER_OTLP_HEADERS_FILE", "/nowhere/headers"),
            ("OTEL_EXPORTER_OTLP_CLIENT_KEY", "key.pem"),
            ("OTEL_METRICS_EXPORTER", "prometheus"),
            ("OTEL_TRACES_SAMPLER", "jaeger_remote"),
            ("OTEL_METRIC_EXPORT_INTERVAL", "0"),
            ("OTEL_BSP_MAX_QUEUE_SIZE", "-1"),
        ] {
            let Err(error) = read(&[BASE, (name, value)]) else { panic!("{name}={value} is taken") };
            assert_eq!(error.kind(), ErrorKind::Config);
            assert!(error.report().contains(name) && !error.report().contains("hunter2"), "{}", error.report());
        }
    }
}
